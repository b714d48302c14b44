"""What is measured, against what, and how the figures reach the README."""
