"""From inputs to a filled store: plan, feed the cluster, resume, export."""
