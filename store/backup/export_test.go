package backup

// Unpack is the parser of what an attacker may have made, for fuzzing without the cost of scrypt.
var Unpack = unpack
