"""What can be trained, sampled and scored: a folder for each value of a recipe's `task`."""
