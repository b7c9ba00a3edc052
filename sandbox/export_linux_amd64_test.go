package sandbox

// Faulting makes a call that may end in a fault.
var Faulting = faulting
