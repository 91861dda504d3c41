"""The fixtures of the Jobs API, for all tests of this folder."""
from served_jobs import acts, client, service
