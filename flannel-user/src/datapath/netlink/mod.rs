//! The kernel datapath: flannel.<VNI>, its address, routes, neighbours and FDB.
