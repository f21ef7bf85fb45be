"""Starting workers, and hearing of them: processes, clusters, restarts, signals."""
