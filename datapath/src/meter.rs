//! Meters: token buckets that drop what exceeds a rate (`OVS_METER_*` in `linux/openvswitch.h`).
