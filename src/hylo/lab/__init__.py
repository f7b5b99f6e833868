"""The laboratory: a suite of arms over seeds, run, compared and shown."""
