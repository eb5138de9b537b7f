"""A service whose code is replaced: each line on standard input is the commit of a new release, rolled out while the old one answers."""
import sys

from ray import serve

from madewithml.config import ServeConfig
from madewithml.serve import ClassifierDeployment, run_service

config = ServeConfig()
with run_service(config, port=int(sys.argv[1])):
    print("Ctrl-C stops it", flush=True)
    for line in sys.stdin:
        options = {"num_cpus": 0.5, "runtime_env": {"env_vars": {"MADEWITHML_GIT_COMMIT": line.strip()}}}
        serve.run(ClassifierDeployment.options(ray_actor_options=options).bind(config), name="madewithml", route_prefix="/")
        print(line.strip(), flush=True)
