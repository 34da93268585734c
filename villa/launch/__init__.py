"""Launchers: start a run in this process, in processes on this machine, or as a SLURM job."""
