// Package archtest holds the project to its architecture.
//
// Its tests check which package may import which (the arrows of ARCHITECTURE.md), what the binaries
// must not contain, and that each package says in one comment what it is. A new package or a new
// arrow goes into the tables here, with its reason. It has no code of its own, and nothing imports
// it.
package archtest
