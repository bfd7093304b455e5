"""Models from where the user keeps them: with their weights, or as skeletons for what only looks."""
