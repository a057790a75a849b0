"""People as judges: a local web page on which completions are rated, compared or corrected."""
