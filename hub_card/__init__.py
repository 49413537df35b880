"""Everything that leaves or enters the project as a checkpoint: model cards, publishing and conversion."""
