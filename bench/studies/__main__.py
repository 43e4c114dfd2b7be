import sys

from . import avg, fine_grained, pivots, pointwise, real, reward, trainers
from .runs import main

MODULES = (avg, fine_grained, pivots, pointwise, reward, trainers)
STUDIES = {study.name: study for study in (*(module.STUDY for module in MODULES), *real.STUDIES)}

if __name__ == "__main__":
    sys.exit(main(STUDIES))
