"""How merge coefficients are found on preference data."""
