"""Scripts that another interpreter runs, where a house's own packages are installed: they know nothing of ours and
need the standard library, numpy and that house's packages alone (:class:`evals.foreign.guests.Guest` drives them)."""
