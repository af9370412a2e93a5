"""`ray job submit -- python jobs/session.py cars --data /shared/cars --store /shared/store`: what `condu-ray learn` does."""

import sys

from condu_ray.cli import main

if __name__ == "__main__":
    main(["learn", *sys.argv[1:]])
