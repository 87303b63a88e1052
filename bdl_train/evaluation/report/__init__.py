"""An evaluation as one HTML page that stands alone: words first, then figures, each with its numbers behind it."""
