"""diffusers_turbo: any diffusers pipeline as fast as its GPU allows, or as small as its VRAM needs, and reversible."""
