from __future__ import annotations

import itertools
import subprocess
import sys
from functools import cache
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from diffusers_turbo.bench.attention_plot import attention_figure
from diffusers_turbo.bench.label_placement import overlaps
from diffusers_turbo.bench.plots import bar_figure, memory_figure, plot_attention, plot_bars, plot_memory
from diffusers_turbo.bench.results import Results, Row, Status
from diffusers_turbo.errors import InvalidOptionError, MissingPackageError
from tests.bench import samples
from tests.bench.samples import Point

POINTS = [
    Point(backend=backend, tokens=tokens, microseconds=tokens**2 / 1e4, peak_bytes=tokens**2 * 2)
    for backend in ("naive", "flash")
    for tokens in (1024, 256, 4096)
] + [Point(backend="naive", tokens=8192, microseconds=None, peak_bytes=None)]


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return "\n".join(found.get_text() for found in figure.findobj(Text) if found.get_visible())


def test_bars_show_every_row_with_its_time_or_what_became_of_it():
    figure = bar_figure(samples.results())
    (axes,) = figure.axes
    text = texts(figure)
    widths = [bar.get_width() for bar in axes.patches]
    assert sorted(widths) == sorted([2.0, 1.6, 0.8, 0.78, 2.0, 1.6, 0.8, 0.78, 3.1, 1.9])  # a picture, not a call
    for said in ("batch 4: out of memory", "batch 1: unsupported", "batch 4: failed", "batch 4: not run"):
        assert said in text
    for label in ("1.60  (+25 %)", "0.780  (+156 %)", "3.10  (-35 %)", "1.90  (+5 %)  1 of 3 rounds"):
        assert label in text
    for name in ("stock (baseline)", "sdpa-flash", "fp16", "automatic", "naive", "xformers", "late"):
        assert name in [tick.get_text() for tick in axes.get_yticklabels()]


def test_bars_name_device_model_units_and_batches():
    figure = bar_figure(samples.results())
    text = texts(figure)
    for said in ("Example GPU, SM 9.0", "arch:sd15, txt2img", "seconds per picture", "quartiles"):
        assert said in text
    legend = figure.axes[0].get_legend()
    assert [entry.get_text() for entry in legend.get_texts()] == ["batch 1", "batch 4", "baseline"]


def test_whiskers_reach_from_quartile_to_quartile():
    row = Row(case="stock", batch=2, steps=50, status=Status.OK, seconds=[2.0, 4.0, 6.0, 8.0, 20.0])
    (axes,) = bar_figure(Results(job=samples.job(), rows=[row], started="")).axes
    (whisker,) = axes.collections
    assert whisker.get_segments()[0][:, 0].tolist() == [2.0, 4.0]  # 4 s and 8 s for two pictures
    assert axes.patches[0].get_width() == 3.0


def outside(figure: Figure) -> bool:
    figure.draw_without_rendering()
    axes = figure.axes[-1]
    return bool(axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1)


@pytest.mark.parametrize("draw", [bar_figure, memory_figure])
def test_legends_lie_outside_and_inside_the_picture(draw):
    figure = draw(samples.results())
    assert outside(figure)
    assert figure.axes[0].get_legend().get_window_extent().x1 <= figure.bbox.x1


def label_boxes(figure: Figure) -> list[tuple[str, tuple[float, ...]]]:
    """The labels beside points, with their place in pixels."""
    figure.draw_without_rendering()
    notes = [found for found in figure.axes[0].findobj(Annotation) if found.get_fontsize() == 8]
    # the text's own box, without the line to its point
    return [(note.get_text(), Text.get_window_extent(note).extents) for note in notes]


def test_memory_labels_every_point_and_notes_the_rest():
    figure = memory_figure(samples.results())
    assert sorted(text for text, _ in label_boxes(figure)) == sorted(
        [*["stock", "sdpa-flash", "fp16", "automatic"] * 2, "naive"]
    )
    text = texts(figure)
    for said in (
        "out of memory: naive (batch 4)",
        "unsupported: xformers (batch 1)",
        "no peak measured: late (batch 1)",
        "not run: late (batch 4)",
        "peak memory (GiB, allocated on the device)",
        "seconds per picture",
        "Example GPU",
    ):
        assert said in text
    assert [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()] == ["batch 1", "batch 4", "baseline"]


def crowd(count: int) -> Results:
    cases = [samples.CASES[0], *(type(samples.CASES[0])(name=f"a-rather-long-name-{index}") for index in range(count))]
    rows = [
        Row(
            case=case.name,
            batch=batch,
            steps=50,
            status=Status.OK,
            seconds=[batch * (2.0 + 0.01 * ((7 * index) % 10))],
            peak_allocated_bytes=(4 + index % 3) * samples.GIB,
        )
        for index, case in enumerate(cases)
        for batch in (1, 4)
    ]
    return Results(job=samples.job(cases=cases), rows=rows, started="")


@cache
def crowded_figure() -> Figure:
    return memory_figure(crowd(14))


@pytest.mark.parametrize("draw", [lambda: memory_figure(samples.results()), crowded_figure], ids=["few", "crowd"])
def test_labels_do_not_overlap(draw):
    boxes = label_boxes(draw())
    assert len(boxes) >= 9
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        assert not overlaps(tuple(box), tuple(another)), (one, other)


def test_in_a_crowd_numbers_stand_for_names_and_a_key_tells_them():
    figure = crowded_figure()
    assert {text for text, _ in label_boxes(figure)} == {str(number) for number in range(1, 16)}
    key = [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()]
    assert "1  stock" in key
    assert "15  a-rather-long-name-13" in key
    assert figure.axes[0].get_legend().get_window_extent().y0 > 0


def test_without_device_memory_the_process_counts():
    row = Row(case="stock", batch=1, steps=1, status=Status.OK, seconds=[1.0], peak_host_bytes=2 * samples.GIB)
    figure = memory_figure(Results(job=samples.job(), rows=[row], started=""))
    assert "of the process" in texts(figure)
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[1.0, 2.0]]


def test_peaks_that_lie_close_to_each_other_have_room_above_them():
    cases = samples.CASES[:2]
    rows = [
        Row(case=case.name, batch=1, steps=1, status=Status.OK, seconds=[seconds], peak_allocated_bytes=peak)
        for case, seconds, peak in zip(cases, (2.4, 2.3), (11.5 * samples.GIB, 11.4 * samples.GIB), strict=True)
    ]
    (axes,) = memory_figure(Results(job=samples.job(cases=cases), rows=rows, started="")).axes
    assert (axes.get_xlim()[0], axes.get_ylim()[0]) == (0, 0)
    assert axes.get_xlim()[1] > 1.1 * 2.4
    assert axes.get_ylim()[1] > 1.1 * 11.5


def test_attention_has_two_logarithmic_panels_with_the_slope_of_n_squared():
    figure = attention_figure(POINTS, device="Example GPU, float16")
    time, memory = figure.axes
    for axes in (time, memory):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        (slope,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        (x0, x1), (y0, y1) = slope.get_data()
        assert y1 / y0 == pytest.approx((x1 / x0) ** 2)
        assert "N²" in [found.get_text() for found in axes.texts]
    naive = next(line for line in time.get_lines() if line.get_label() == "naive")
    assert naive.get_xdata().tolist() == [256, 1024, 4096]  # sorted, and without the length that did not run
    text = texts(figure)
    for said in ("Example GPU, float16", "time (microseconds)", "peak memory", "tokens N", "MiB"):
        assert said in text
    assert "naive: not run at 8192 tokens" in text
    assert [entry.get_text() for entry in memory.get_legend().get_texts()] == ["naive", "flash"]
    assert outside(figure)


def test_attention_without_a_measured_point_is_refused(tmp_path):
    with pytest.raises(InvalidOptionError, match="no measured point"):
        plot_attention(POINTS[-1:], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("draw", [bar_figure, memory_figure])
def test_results_without_rows_draw_empty_axes_that_still_say_what_they_are(draw):
    assert "arch:sd15" in texts(draw(Results(job=samples.job(), started="")))


def test_names_are_never_read_as_formulas():
    results = crowd(0)
    results.rows = [Row(case="stock", batch=1, steps=1, status=Status.OK, seconds=[1.0], peak_allocated_bytes=1)]
    results.environment["device_name"] = "costs $5 and $\\broken"
    for draw in (bar_figure, memory_figure):
        assert "costs $5 and $\\broken" in texts(draw(results))


def test_files_are_pictures_and_whole(tmp_path):
    plot_bars(crowd(0), tmp_path / "new" / "bars.png")
    plot_memory(crowd(0), tmp_path / "memory.svg")
    plot_attention(POINTS, tmp_path / "attention.PDF")
    png = (tmp_path / "new" / "bars.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert png.rstrip().endswith(b"IEND\xaeB`\x82")
    assert ElementTree.parse(tmp_path / "memory.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "attention.PDF").read_bytes().startswith(b"%PDF")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name", ["bars.bmp", "bars", "bars.json"])
def test_an_unknown_ending_is_refused(tmp_path, name):
    with pytest.raises(InvalidOptionError, match="needed: a name ending in .png, .svg, .pdf"):
        plot_bars(samples.results(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOptionError, match="writing the plot to") as caught:
        plot_bars(Results(job=samples.job(), started=""), tmp_path / "file" / "bars.png")
    assert "\n" not in str(caught.value)


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r'pip install "diffusers-turbo\[cli\]"'):
        plot_bars(samples.results(), tmp_path / "bars.png")


def test_importing_needs_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    """In a process of its own, where nothing else has imported either."""
    code = (
        "import sys\n"
        "from diffusers_turbo.bench import environment, plots, results, tables\n"
        "assert not {'matplotlib', 'rich'} & set(sys.modules)\n"
        "from tests.bench import samples\n"
        # through dict, since asking RcParams for its backend imports pyplot
        "import matplotlib; before = sorted(map(str, dict.items(matplotlib.rcParams)))\n"
        f"plots.plot_memory(samples.results(), {str(tmp_path / 'memory.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert sorted(map(str, dict.items(matplotlib.rcParams))) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
