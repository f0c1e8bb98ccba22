//! Kernel link, address, route, neighbour and FDB changes as wake-ups.
