"""Where a run takes place: in this process, in processes of this machine, or as a job of SLURM."""
