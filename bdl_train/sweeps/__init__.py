"""Many trainings as one: which settings to try next, which trial to stop early, and the record of what was tried."""
