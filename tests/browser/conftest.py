"Chromium, and the state after the jobs `features` and `train`, which these tests share with the integration tests."
from chromium import browser
from states import trained
