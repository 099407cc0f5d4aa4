"""What changes weights: TRL's trainers, expert schedules, policies."""
