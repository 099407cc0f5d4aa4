"""mergekit, both ways: our method in it, its methods on our experts."""
