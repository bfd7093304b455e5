"""Jobs of the commands that look and change nothing: methods, show, plan, tree, doctor."""
