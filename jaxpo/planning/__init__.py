"""What a run will take, said before it runs: memory, arithmetic, what crosses devices, time."""
