"""Other programs that start our ranks: the deepspeed launcher, mpiexec, Slurm."""
