"""What `condu-ray sweep` does, as a job: `ray job submit -- python jobs/sweep.py sweep.yaml --work /shared/sweep`."""

import sys

from condu_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
