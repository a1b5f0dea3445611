"""fastdiff inside of other tools."""
