"""The checks, a module for each part of the specification."""
