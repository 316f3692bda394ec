"""Commands that check, start and supervise the processes of a run, on this machine or on a cluster."""
