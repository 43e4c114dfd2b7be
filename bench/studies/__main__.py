import sys

from . import avg, fine_grained, pivots, pointwise, real, reward, trainers
from .runs import main

MODULES = (avg, fine_grained, pivots, pointwise, reward, trainers)
OTHERS = (reward.SHIFT, *real.STUDIES)
STUDIES = {study.name: study for study in (*(module.STUDY for module in MODULES), *OTHERS)}

if __name__ == "__main__":
    sys.exit(main(STUDIES))
