"The state after the jobs `features` and `train`, which these tests share with the integration tests."
from states import trained
