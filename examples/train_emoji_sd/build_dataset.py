"""Build the training set: pinned npm packages -> 128 px WebP on white in one zip, and captions.jsonl beside it.

    python build_dataset.py --out emoji_data [--packages FOLDER_WITH_TGZ]

Needs `npm` on the PATH (unless every tarball is already in --packages), resvg_py and pillow.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import resvg_py
from config import EMOJIBASE, GROUPS, IMAGE_SIZE, STYLES, Package
from PIL import Image

Renderer = Callable[[str], Image.Image | None]  # hexcode without variation selectors -> RGBA picture


def fetch(package: Package, folder: Path) -> tarfile.TarFile:
    """Open the package's tarball, downloaded by `npm pack` when missing.

    Raises:
        ValueError: the file's SHA-512 is not the pinned one.
    """
    path = folder / package.tarball
    if not path.exists():
        subprocess.run(["npm", "pack", package.spec, "--silent", "--pack-destination", str(folder)], check=True)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != package.integrity:
        raise ValueError(f"{path} has integrity {digest}, expected {package.integrity}: delete it and run again")
    return tarfile.open(path)


def read_json(tar: tarfile.TarFile, name: str) -> dict | list:
    return json.load(tar.extractfile(f"package/{name}"))


def normal(hexcode: str) -> str:
    """One spelling for all sets: lower case, no emoji variation selector.

    >>> normal("2764-FE0F")
    '2764'
    """
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def iconify_renderer(tar: tarfile.TarFile, names: dict[str, str]) -> Renderer:
    """Render an icon set of Iconify; `names` maps hexcode to icon name."""
    icons = read_json(tar, "icons.json")

    def render(hexcode: str) -> Image.Image | None:
        name = names.get(hexcode)
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        # A few icons are not square; the viewer centres them, as resvg does with the default preserveAspectRatio.
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))

    return render


def bitmap_renderer(tar: tarfile.TarFile) -> Renderer:
    """Read 256 px pictures named by hexcode from `assets/`."""
    members = {normal(Path(m.name).stem): m for m in tar.getmembers() if m.name.startswith("package/assets/")}

    def render(hexcode: str) -> Image.Image | None:
        return Image.open(tar.extractfile(members[hexcode])) if hexcode in members else None

    return render


def on_white(picture: Image.Image) -> Image.Image:
    """Composite over white, at `IMAGE_SIZE`; resized in premultiplied space so that edges get no dark fringe."""
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture.convert("RGBA"))
    return canvas.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)


def renderers(packages: Path) -> dict[str, Renderer]:
    tars = {style: fetch(package, packages) for style, package in STYLES.items()}

    def chars(style: str) -> dict[str, str]:
        return {normal(code): name for code, name in read_json(tars[style], "chars.json").items()}

    return {
        "flat": iconify_renderer(tars["flat"], chars("flat")),
        # The gradient set publishes no hexcodes; its icons carry the names of the flat set.
        "gradient": iconify_renderer(tars["gradient"], chars("flat")),
        "3d": bitmap_renderer(tars["3d"]),
        "noto": iconify_renderer(tars["noto"], chars("noto")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", type=Path, help="where the .tgz files are or go (default: OUT/packages)")
    parser.add_argument("--limit", type=int, help="stop after this many concepts (for smoke runs)")
    args = parser.parse_args()
    packages = args.packages or args.out / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    sets = renderers(packages)
    entries = [e for e in read_json(fetch(EMOJIBASE, packages), "en/data.json") if e.get("group") in GROUPS]
    kept = 0
    with zipfile.ZipFile(args.out / "emoji.zip", "w") as archive, open(args.out / "captions.jsonl", "w") as captions:
        for entry in sorted(entries, key=lambda e: e["order"]):
            hexcode = normal(entry["hexcode"])
            pictures = {style: render(hexcode) for style, render in sets.items()}
            if any(picture is None for picture in pictures.values()):
                continue  # only concepts that all four sets draw, so that style and concept are independent
            for style, picture in pictures.items():
                data = io.BytesIO()
                on_white(picture).save(data, "WEBP", lossless=True, quality=100, method=4)
                # A fixed date makes the archive the same, byte for byte, on every run.
                archive.writestr(zipfile.ZipInfo(f"{style}/{hexcode}.webp"), data.getvalue())
            label = entry["label"].replace("\u2019", "'")  # as people type it
            tags = [tag for tag in entry.get("tags", []) if tag not in label]
            captions.write(json.dumps({"hexcode": hexcode, "label": label, "tags": tags}, ensure_ascii=False) + "\n")
            kept += 1
            if kept == args.limit:
                break
    size_mib = (args.out / "emoji.zip").stat().st_size / 2**20
    print(f"{kept} concepts x {len(sets)} styles = {kept * len(sets)} images, {size_mib:.1f} MiB")


if __name__ == "__main__":
    main()
