"""A service whose code is replaced: each line of standard input is the commit of a new release."""
import sys

from ray import serve

from madewithml.config import ServeConfig
from madewithml.serve import ClassifierDeployment, run_service

config = ServeConfig()
with run_service(config, port=int(sys.argv[1])):
    print("Ctrl-C stops it", flush=True)
    for commit in map(str.strip, sys.stdin):
        runtime_env = {"env_vars": {"MADEWITHML_GIT_COMMIT": commit}}
        options = {"num_cpus": 0.5, "runtime_env": runtime_env}
        deployment = ClassifierDeployment.options(ray_actor_options=options).bind(config)
        serve.run(deployment, name="madewithml", route_prefix="/")
        print(commit, flush=True)
