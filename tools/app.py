"""Serve the app on a page of its own: `make app`, or `make app PORT=9000 HOST=0.0.0.0 TOKEN=…`."""

import argparse
import ipaddress
import os
import runpy
import socket
import sys
import urllib.parse
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / 'app'


def is_loopback(host: str) -> bool:
    "Whether only this machine can reach that address."
    if host == 'localhost':
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def address(host: str, port: int, token: str) -> str:
    "What others type to reach the app."
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:  # a name
        ip = None
    if ip and ip.is_unspecified:  # every address of this machine
        host = socket.gethostname()
    elif ip and ip.version == 6:
        host = f'[{host}]'
    return f'http://{host}:{port}/?token={urllib.parse.quote(token, safe="")}'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--host', default='127.0.0.1')
    parser.add_argument('--port', type=int, default=8866)
    parser.add_argument('--token', default='')
    parser.add_argument('--no-browser', action='store_true')
    options = parser.parse_args()
    if not is_loopback(options.host) and not options.token:
        sys.exit(
            f'Others could reach the app on {options.host}, and make this machine compute. Give '
            'them a password: make app HOST=… TOKEN=a-long-word, and the address that it shows. '
            'Put a proxy with https before it where the network between is not yours.'
        )
    arguments = [
        *('voila', 'enhance.ipynb', f'--Voila.ip={options.host}', f'--port={options.port}'),
        *([f'--token={options.token}'] if options.token else []),
        *(['--no-browser'] if options.no_browser else []),
    ]
    # Voilà looks for its templates along this path, and for voila.json where it is started
    paths = [str(FOLDER / 'jupyter'), os.environ.get('JUPYTER_PATH', '')]
    os.environ['JUPYTER_PATH'] = os.pathsep.join(filter(None, paths))
    if options.token:  # Voilà shows the address with dots in its place
        print(f'The app: {address(options.host, options.port, options.token)}', flush=True)
    os.chdir(FOLDER)
    # as `python -m voila`, but in this process: what Windows calls exec loses terminal and spaces
    sys.argv, sys.path[0] = arguments, str(FOLDER)
    runpy.run_module('voila', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    main()
