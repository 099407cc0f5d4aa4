"""How numbers are shown: statistics, tables, figures, pages."""
