"""Models as their frameworks' users write them, none prepared for capture."""
