"""A small run of every built system on a real input: `heed demo SLUG`. One file per system."""
