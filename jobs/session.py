"""What `condu-ray learn` does, as a job: `ray job submit -- python jobs/session.py cars --data /shared/cars`."""

import sys

from condu_ray.cli import main

if __name__ == "__main__":
    main(["learn", *sys.argv[1:]])
