"""One file per target: carry the integers of a checkpoint into its format and prove it by running."""
