"""An example plug-in for lamzoo."""
