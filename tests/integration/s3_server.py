"""An S3 server that checks signatures, for tests: moto, on the loopback device.

Usage: s3_server.py BUCKET [CERTIFICATE KEY] [unchecked]

With a certificate and its key (PEM files) it serves over TLS, too.

"unchecked" takes any signature: what moto makes of a "/" in a query matches nobody's, not even that of AWS's own client.

Prints one line when it serves: "ready PORT KEY SECRET SESSION_KEY SESSION_SECRET SESSION_TOKEN [TLS_PORT]",
two sets of credentials of which the second one is temporary. Ends with its parent.
"""

import json
import logging
import os
import sys
import threading
import time

# So many calls are let through unsigned: those that make the user.
if "unchecked" not in sys.argv:
    os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "3"

import boto3  # noqa: E402
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

ALL_OF_S3 = json.dumps({"Version": "2012-10-17",
                        "Statement": [{"Effect": "Allow", "Action": ["s3:*", "iam:*", "sts:*"], "Resource": "*"}]})
ANYBODY = json.dumps({"Version": "2012-10-17",
                      "Statement": [{"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"}]})


def serve_over_tls(certificate: str, key: str) -> int:
    """The same buckets on another port, which it returns."""
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=(certificate, key))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def main() -> None:
    parent = os.getppid()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()

    def client(service: str, key: str, secret: str):
        return boto3.client(service, endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                            aws_access_key_id=key, aws_secret_access_key=secret)

    iam = client("iam", "nobody", "nothing")
    iam.create_user(UserName="kvern")
    iam.put_user_policy(UserName="kvern", PolicyName="all", PolicyDocument=ALL_OF_S3)
    user = iam.create_access_key(UserName="kvern")["AccessKey"]
    signed = (user["AccessKeyId"], user["SecretAccessKey"])
    iam = client("iam", *signed)
    role = iam.create_role(RoleName="kvern", AssumeRolePolicyDocument=ANYBODY)["Role"]["Arn"]
    iam.put_role_policy(RoleName="kvern", PolicyName="all", PolicyDocument=ALL_OF_S3)
    session = client("sts", *signed).assume_role(RoleArn=role, RoleSessionName="kvern")["Credentials"]
    client("s3", *signed).create_bucket(Bucket=sys.argv[1])
    files = [argument for argument in sys.argv[2:] if argument.endswith(".pem")]
    tls_port = [serve_over_tls(*files)] if files else []
    print("ready", port, *signed, session["AccessKeyId"], session["SecretAccessKey"], session["SessionToken"], *tls_port,
          flush=True)
    while os.getppid() == parent:
        time.sleep(0.2)
    server.stop()


main()
