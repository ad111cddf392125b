"""Large pictures in tiles: where they lie, how they are blended, and the statistics they share."""
