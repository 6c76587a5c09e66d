"""What the paper did, on real data: experiments built on `fgrad`."""
