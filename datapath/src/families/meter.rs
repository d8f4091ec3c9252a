//! `ovs_meter`: the meters of a datapath, set, read and deleted.
