"""Device mesh, the table of sharding rules, the placement report."""
