"""A study of baselines: which one learns fastest, at equal samples and at equal seconds."""
