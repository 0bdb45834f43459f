"""Campaigns: damaged files, hostile graphs, signals and wrong implementations, by the thousand."""
